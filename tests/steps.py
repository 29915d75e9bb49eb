"Steps of any size for the tests of losses and methods."

from mbs.protocol import Protocol, Step


def make_step(n_old: int, n_new: int) -> Step:
    "The step that adds `n_new` classes to `n_old` channels, background included; the base step if `n_old` is 1."
    n_classes = n_old - 1 + n_new
    if n_old == 1:
        return Protocol("offline", n_classes)[0]
    return Protocol(f"{n_old - 1}-{n_new}", n_classes)[1]
