"""Backbones: from an image to feature maps. Parameter names are those of the published ImageNet checkpoints."""
