"""Several ranks: each has its own KV heads, its own pool, and the same page numbers.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import hashlib
import os

import torch
import torch.distributed as dist

import kvsig

LAYERS, PAGES, PAGE, HEADS, WIDTH = 8, 32, 16, 8, 128


def digest(tensor):
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy()).hexdigest()


def main():
    ranks = int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.device_count() >= ranks
    if not gpu:
        os.environ.setdefault("KVSIG_CUDART", "emulated:13.0")
    dist.init_process_group("nccl" if gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    stream = torch.cuda.Stream() if gpu else kvsig.emulated.Stream()

    # All ranks make the whole cache from one seed, and keep their own heads of it.
    torch.manual_seed(0)
    whole = torch.randn(2, LAYERS, PAGES * PAGE, HEADS, WIDTH).bfloat16()
    heads = HEADS // ranks
    shard = whole[:, :, :, rank * heads : (rank + 1) * heads].contiguous()
    kv = shard.to(device, copy=True)
    pool = torch.zeros(2, PAGES, LAYERS, PAGE, heads, WIDTH, dtype=kv.dtype, pin_memory=gpu)
    cache = kvsig.PagedKVCache(device=(list(kv[0]), list(kv[1])), host=pool, page_size=PAGE)
    if gpu:
        stream.wait_stream(torch.cuda.current_stream())

    # The scheduler's numbers are the same on every rank: half of the pages out, and back elsewhere.
    out = torch.randperm(PAGES)[: PAGES // 2]
    host = torch.randperm(PAGES)[: PAGES // 2]
    back = torch.randperm(PAGES)[: PAGES // 2]
    cache.offload(out, host, stream=stream)
    stream.synchronize()
    kv.zero_()
    if gpu:
        stream.wait_stream(torch.cuda.current_stream())
    report = cache.load(host, back, stream=stream)
    stream.synchronize()
    paged = kv.cpu().unflatten(2, (PAGES, PAGE))
    assert torch.equal(paged[:, :, back], shard.unflatten(2, (PAGES, PAGE))[:, :, out])

    # A digest of each shard goes over the group; rank 0 makes the same from the whole.
    found = [None] * ranks
    dist.all_gather_object(found, digest(paged[:, :, back]))
    expected = whole.unflatten(2, (PAGES, PAGE))[:, :, out].chunk(ranks, dim=4)
    assert found == [digest(part) for part in expected]
    if rank == 0:
        where = f"{ranks} GPUs, NCCL" if gpu else f"{ranks} ranks on the emulated runtime, gloo"
        print(f"every shard is right ({where}); rank 0: {report}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
