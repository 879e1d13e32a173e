"""The command line: one typed dataclass per command, assembled by `main`; nothing here computes."""
