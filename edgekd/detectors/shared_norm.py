"""Batch normalisation over the whole batch when several processes share it."""

from __future__ import annotations

from torch import Tensor, nn

from edgekd.ranks import mean_over_ranks, world_size


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all ranks' images; torch's own, SyncBatchNorm, runs on GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; every rank must give the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        wide = input.float()  # as torch's own does: of bf16 activations too, statistics are kept in single precision
        mean = mean_over_ranks(wide.mean((0, 2, 3)))
        centred = wide - mean[:, None, None]
        variance = mean_over_ranks(centred.square().mean((0, 2, 3)))
        count = input.numel() // len(mean) * world_size()
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * (count / max(1, count - 1)), self.momentum)
        self.num_batches_tracked += 1
        scaled = centred * (self.weight * (variance + self.eps).rsqrt())[:, None, None]
        return (scaled + self.bias[:, None, None]).to(input.dtype)


def share_batch_norm(module: nn.Module, on_gpu: bool) -> None:
    """Make every BatchNorm2d in `module` see the whole batch; parameters, buffers and their names stay."""
    if on_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
            shared.weight, shared.bias = child.weight, child.bias
            shared.running_mean, shared.running_var = child.running_mean, child.running_var
            shared.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, shared.train(child.training))
        else:
            share_batch_norm(child, on_gpu)
