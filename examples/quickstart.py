"""The quickstart of README.md and docs/quickstart.md: it runs with a GPU and without one."""

import torch

import kvsig

device, stream = kvsig.emulated.start()  # the GPU, or the emulated runtime where there is none

# A cache of 8 layers, K and V, 64 pages of 16 tokens, and a host pool that holds as many.
layers, pages, page_size, heads, width = 8, 64, 16, 8, 128
kv = torch.randn(2, layers, pages * page_size, heads, width, device=device).bfloat16()
pool = torch.zeros(2, pages, layers, page_size, heads, width, dtype=kv.dtype)
pool = pool.pin_memory() if device.type == "cuda" else pool
cache = kvsig.PagedKVCache(device=(list(kv[0]), list(kv[1])), host=pool, page_size=page_size)
before = kv.to("cpu", copy=True)  # to compare with; it also waits until the cache is filled

# Device pages 7, 3, 11 go to host pages 40, 2, 21; two of them come back to other device pages.
print(cache.offload([7, 3, 11], [40, 2, 21], stream=stream))
print(cache.load([2, 21], [0, 1], stream=stream))
stream.synchronize()  # transfers do not wait: look at the bytes only from here on

paged = before.unflatten(2, (pages, page_size))
after = kv.cpu().unflatten(2, (pages, page_size))
assert torch.equal(pool[:, 40], paged[:, :, 7])
assert torch.equal(after[:, :, 0], paged[:, :, 3])
assert torch.equal(after[:, :, 1], paged[:, :, 11])
print("the same bytes")
