"""Models of movement: the residual quantiser that makes tokens of clips, and the transformer that writes them."""
