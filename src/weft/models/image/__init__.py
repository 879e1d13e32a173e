"""Image families: one file adapts one family's diffusers modules to `weft.types.FlowModel`."""
