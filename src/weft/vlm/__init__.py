"""Asking a multimodal language model: its inputs, in process or over a server."""
