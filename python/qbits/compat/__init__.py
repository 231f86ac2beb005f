"""Other packages' spellings of what qbits does, for programs written against them; imported on request."""

from qbits.compat.redirect import install, patched, uninstall

__all__ = ["bitsandbytes", "install", "patched", "uninstall"]
