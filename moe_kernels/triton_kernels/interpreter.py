"""What Triton's interpreter (TRITON_INTERPRET=1) needs to run beside the NumPy at hand."""

import triton

NEEDS_MENDING = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


def mend_loop_bounds() -> None:
    """Lets bounds of loops be read, which Triton 3.6 turns into integers by int() of an array of one element: since
    NumPy 2.4 that is a TypeError."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
