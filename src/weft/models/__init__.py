"""Model families on diffusers/transformers modules. `weft.models.load.load` opens a folder."""
