"""A prefix cache in two tiers: pages on the GPU, and behind them, least recently used, on the host.

A small transformer with random weights answers prompts that share prefixes. Its KV cache on the
GPU is too small for all of them, so full pages go to the host when their room is needed, and come
back when a prompt begins with them. The tokens are the same as where everything is computed anew.
"""

from collections import OrderedDict

import torch

import kvsig

LAYERS, HEADS, WIDTH, VOCAB, PAGE = 4, 4, 16, 97, 4
GPU_PAGES, HOST_PAGES = 12, 64

device, stream = kvsig.emulated.start()
gpu = device.type == "cuda"
torch.manual_seed(0)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, device=device) / shape[0] ** 0.5


class Transformer:
    """Attention and a feed-forward layer, four times; its keys and values are in `kv`."""

    def __init__(self):
        hidden = HEADS * WIDTH
        self.embed, self.head = random(VOCAB, hidden), random(hidden, VOCAB)
        self.layers = [
            (random(hidden, 3 * hidden), random(hidden, 2 * hidden), random(2 * hidden, hidden))
            for _ in range(LAYERS)
        ]

    def forward(self, tokens, start, rows, kv):
        """Compute tokens[start:] into `rows` of the cache, and return the next token."""
        x = self.embed[torch.tensor(tokens[start:], device=device)] * VOCAB**0.5
        rows = torch.tensor(rows, device=device)
        ahead = torch.ones(len(x), len(rows), device=device).triu(start + 1).bool()
        for layer, (qkv, up, down) in enumerate(self.layers):
            q, k, v = (x / x.norm(dim=-1, keepdim=True) @ qkv).view(-1, 3, HEADS, WIDTH).unbind(1)
            kv[0, layer, rows[start:]], kv[1, layer, rows[start:]] = k, v
            keys, values = kv[0, layer, rows], kv[1, layer, rows]
            score = torch.einsum("qhd,khd->hqk", q, keys) * WIDTH
            weight = score.masked_fill(ahead, -torch.inf).softmax(-1)
            x = x + torch.einsum("hqk,khd->qhd", weight, values).flatten(1)
            x = x + (x @ up).relu() @ down
        return int((x[-1] @ self.head).argmax())


class PrefixCache:
    """Pages by the tokens that lead up to their end: first on the GPU, then on the host."""

    def __init__(self):
        shape = (2, LAYERS, GPU_PAGES * PAGE, HEADS, WIDTH)
        self.kv = torch.zeros(shape, dtype=torch.float64, device=device)
        shape = (2, HOST_PAGES, LAYERS, PAGE, HEADS, WIDTH)
        pool = torch.zeros(shape, dtype=torch.float64, pin_memory=gpu)
        layers = (list(self.kv[0]), list(self.kv[1]))
        self.pages = kvsig.PagedKVCache(device=layers, host=pool, page_size=PAGE)
        self.stream = torch.cuda.current_stream() if gpu else stream
        self.gpu, self.host = OrderedDict(), OrderedDict()  # the first is the least recently used
        self.free = {"gpu": list(range(GPU_PAGES)), "host": list(range(HOST_PAGES))}
        self.loaded = self.offloaded = 0

    def find(self, tokens):
        """Bring the pages that `tokens` begins with to the GPU, and return their numbers."""
        keys = [tuple(tokens[:end]) for end in range(PAGE, len(tokens), PAGE)]
        unknown = (i for i, key in enumerate(keys) if key not in self.gpu | self.host)
        keys = keys[: next(unknown, len(keys))]
        for key in keys:
            for tier in (self.gpu, self.host):
                if key in tier:
                    tier.move_to_end(key)
        missing = [key for key in keys if key not in self.gpu]
        for key in missing:
            self.gpu[key] = self.room(keys)
        if missing:
            host, device_pages = ([tier[key] for key in missing] for tier in (self.host, self.gpu))
            self.pages.load(host, device_pages, stream=self.stream)
            self.stream.synchronize()
            self.loaded += len(missing)
        return [self.gpu[key] for key in keys]

    def room(self, keep=()):
        """Return a free page of the GPU; the least recently used one goes to the host for it."""
        if not self.free["gpu"]:
            key = next(key for key in self.gpu if key not in keep)
            page = self.gpu.pop(key)
            if key not in self.host:
                if not self.free["host"]:
                    self.free["host"].append(self.host.popitem(last=False)[1])
                self.host[key] = self.free["host"].pop()
                self.pages.offload([page], [self.host[key]], stream=self.stream)
                self.stream.synchronize()
                self.offloaded += 1
            self.free["gpu"].append(page)
        return self.free["gpu"].pop()

    def answer(self, model, prompt, count):
        """Return `count` tokens after the prompt, greedily."""
        tokens, table = list(prompt), self.find(prompt)
        start = len(table) * PAGE
        for _ in range(count):
            kept = {tuple(tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)}
            while len(table) * PAGE < len(tokens):
                table.append(self.room(kept))
            rows = [table[i // PAGE] * PAGE + i % PAGE for i in range(len(tokens))]
            new = model.forward(tokens, start, rows, self.kv)
            for end in range(PAGE * (start // PAGE + 1), len(tokens) + 1, PAGE):
                page = self.gpu.setdefault(tuple(tokens[:end]), table[end // PAGE - 1])
                if page != table[end // PAGE - 1]:  # it was there, behind a page that was not
                    self.free["gpu"].append(table[end // PAGE - 1])
                    table[end // PAGE - 1] = page
            start = len(tokens)
            tokens.append(new)
        if start % PAGE:
            self.free["gpu"].append(table[-1])  # the last page is not full, and stays nobody's
        return tokens[len(prompt) :]


def main():
    model, cache = Transformer(), PrefixCache()
    chapters = [torch.randint(VOCAB, (12,)).tolist() for _ in range(4)]
    for turn in range(12):
        prompt = chapters[turn % 4] + torch.randint(VOCAB, (2 + turn % 5,)).tolist()
        expected = list(prompt)
        for _ in range(6):
            scratch = torch.zeros_like(cache.kv)
            expected.append(model.forward(expected, 0, list(range(len(expected))), scratch))
        assert cache.answer(model, prompt, 6) == expected[len(prompt) :], f"turn {turn}"
    assert cache.loaded and cache.offloaded
    print(f"the same tokens; {cache.offloaded} pages offloaded, {cache.loaded} loaded")


if __name__ == "__main__":
    main()
