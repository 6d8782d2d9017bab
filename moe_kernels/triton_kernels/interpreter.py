"""A patch that lets Triton's interpreter (TRITON_INTERPRET=1) run with NumPy 2.4 and later."""

import triton

NEEDS_PATCH = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


def patch_loop_bounds() -> None:
    """Lets loop bounds be scalar tensors: Triton before 3.9 converts them by int() of an array of one element, a
    TypeError since NumPy 2.4."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: interpreter._LangPatchScope) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
