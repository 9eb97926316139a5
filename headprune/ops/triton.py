"""The Triton kernels, behind the operators."""


def register_triton() -> None:
    pass
