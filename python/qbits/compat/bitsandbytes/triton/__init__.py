"""The int8 kernels under SwitchBack by bitsandbytes' names; native or Triton, whichever runs."""

__all__: list[str] = []
