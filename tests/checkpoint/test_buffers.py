from __future__ import annotations

import threading

import torch

from realign.checkpoint.buffers import Buffers

SHAPE = (512, 256)


def test_a_block_is_used_again_only_when_its_last_view_is_gone() -> None:
    buffers = Buffers()
    first = buffers.empty(SHAPE, torch.float32).fill_(1.0)
    place, view = first.data_ptr(), first[3:5].reshape(-1)
    del first
    second = buffers.empty(SHAPE, torch.float32).fill_(2.0)
    assert second.data_ptr() != place
    assert bool((view == 1.0).all())
    del view
    assert buffers.empty(SHAPE, torch.float32).data_ptr() == place


def test_other_types_of_the_same_size_share_blocks_and_small_ones_are_plain() -> None:
    buffers = Buffers()
    place = buffers.empty(SHAPE, torch.float32).data_ptr()
    again = buffers.empty((1024, 256), torch.bfloat16)
    assert (again.data_ptr(), again.dtype, tuple(again.shape)) == (
        place,
        torch.bfloat16,
        (1024, 256),
    )
    assert tuple(buffers.empty((0, 4), torch.float16).shape) == (0, 4)
    assert tuple(buffers.empty((), torch.float32).shape) == ()


def test_threads_never_get_the_same_block() -> None:
    buffers = Buffers()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            mine = buffers.empty(SHAPE, torch.float32).fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
