/* SPDX-License-Identifier: Apache-2.0 */
/* Text that grows. */
#include "runtime.h"

#include <stdarg.h>

void *must(void *pointer)
{
    if (!pointer) {
        fputs("kvsig emulated runtime: out of memory\n", stderr);
        abort();
    }
    return pointer;
}

void text_bytes(struct text *text, const char *data, size_t length)
{
    if (text->length + length + 1 > text->room) {
        text->room = (text->length + length + 1) * 2;
        text->data = must(realloc(text->data, text->room));
    }
    memcpy(text->data + text->length, data, length);
    text->length += length;
    text->data[text->length] = 0;
}

void text_add(struct text *text, const char *format, ...)
{
    char buffer[128];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    if (length > 0)
        text_bytes(text, buffer,
                   (size_t)length < sizeof buffer ? (size_t)length : sizeof buffer - 1);
}

void text_string(struct text *text, const char *string)
{
    text_bytes(text, "\"", 1);
    for (size_t i = 0; string && string[i] && i < 1024; i++) {
        unsigned char c = (unsigned char)string[i];
        if (c == '"' || c == '\\')
            text_add(text, "\\%c", c);
        else if (c < 0x20 || c >= 0x7f)
            text_add(text, "\\u%04x", c);
        else
            text_bytes(text, &string[i], 1);
    }
    text_bytes(text, "\"", 1);
}

void text_hex(struct text *text, const void *data, size_t size)
{
    text_bytes(text, "\"", 1);
    for (size_t i = 0; i < size; i++)
        text_add(text, "%02x", ((const unsigned char *)data)[i]);
    text_bytes(text, "\"", 1);
}
