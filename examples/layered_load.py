"""Layered load: an event behind each layer; computing begins while others are on their way."""

import torch

import kvsig

LAYERS, PAGES, PAGE, HEADS, WIDTH = 16, 64, 16, 8, 128


class EmulatedEvent:
    """What torch.cuda.Event is on a GPU, by the same CUDA functions."""

    def __init__(self):
        self.handle = kvsig.call("cudaEventCreateWithFlags", flags=2)

    def record(self, stream):
        kvsig.call("cudaEventRecord", event=self.handle, stream=stream)

    def synchronize(self):
        kvsig.call("cudaEventSynchronize", event=self.handle)


def main():
    device, copies = kvsig.emulated.start()
    gpu = device.type == "cuda"
    events = [torch.cuda.Event() if gpu else EmulatedEvent() for _ in range(LAYERS)]

    kv = torch.zeros(2, LAYERS, PAGES * PAGE, HEADS, WIDTH, dtype=torch.bfloat16, device=device)
    pool = torch.empty(2, PAGES, LAYERS, PAGE, HEADS, WIDTH, dtype=kv.dtype, pin_memory=gpu)
    pool.normal_()
    cache = kvsig.PagedKVCache(device=(list(kv[0]), list(kv[1])), host=pool, page_size=PAGE)
    host_pages = torch.randperm(PAGES)
    if gpu:
        copies.wait_stream(torch.cuda.current_stream())  # the cache is filled with zeros by then
    report = cache.load(host_pages, torch.arange(PAGES), stream=copies, events=events)

    # The model: a layer waits for its own pages only, and the host waits for nothing.
    sums = []
    for layer, event in enumerate(events):
        if gpu:
            torch.cuda.current_stream().wait_event(event)
        else:
            event.synchronize()
        sums.append(kv[:, layer].double().sum())
    wanted = pool[:, host_pages].double().sum(dim=(0, 1, 3, 4, 5))
    assert torch.allclose(torch.stack(sums).cpu(), wanted)
    copies.synchronize()
    paged = kv.cpu().unflatten(2, (PAGES, PAGE))
    assert torch.equal(paged.transpose(1, 2), pool[:, host_pages])
    print(f"{LAYERS} layers, each computed behind its own event: {report}")


if __name__ == "__main__":
    main()
