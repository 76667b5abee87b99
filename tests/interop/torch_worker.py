"""One of several processes that train a to_torch model together: FOLDER RANK COUNT MEETING_PLACE OUTPUT.

Each takes its rows of the batch; the first writes {"ddp" or "fsdp": (loss, gradients)} as they are for the whole batch.
"""

import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modelhub import CausalLM, to_torch

IDS = torch.arange(4 * 16).reshape(4, 16) * 7919 % 400


def results(model, ids, count):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    total = loss.detach().clone()
    distributed.all_reduce(total)
    gradients = {name.removeprefix("module."): x.grad for name, x in model.named_parameters() if x.grad is not None}
    return total / count, {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in gradients.items()}


def main(folder, rank, count, meeting_place, output):
    rank, count = int(rank), int(count)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=count)
    rows = IDS.chunk(count)[rank]
    found = {
        "ddp": results(DistributedDataParallel(to_torch(CausalLM.from_preset(folder, backend="torch"))), rows, count)
    }
    net = to_torch(CausalLM.from_preset(folder, backend="torch"))
    for block in net.model.layers:
        fully_shard(block)
    fully_shard(net)
    assert isinstance(net.model.layers[0].mlp.up_proj.weight, DTensor)
    found["fsdp"] = results(net, rows, count)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    optimizer.step()
    optimizer.zero_grad()
    found["after a step"] = results(net, rows, count)
    if rank == 0:
        torch.save(found, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
