"""SOAP and KL-Shampoo over seven steps against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shared.shampoo_reference import KLShampooReference, SOAPReference, feed, fresh_state, relative

from hf_so2.curvature.kl_shampoo import KLShampoo
from hf_so2.curvature.soap import SOAP
from hf_so2.damping import Damping

SHAPES = [(3, 3), (3, 7), (8, 4), (1, 5), (15, 31), (31, 15)]
SCHEDULES = {"every step": {1, 2, 3, 4, 5, 6, 7}, "early steps": {1, 2, 4, 7}, "once": {1}}


def gradients(shape: tuple[int, int], scale: float = 1.0) -> list[np.ndarray]:
    """Seven, correlated along both dimensions."""
    rng = np.random.default_rng(shape[0] * 100 + shape[1])
    left, right = rng.normal(size=(shape[0], shape[0])), rng.normal(size=(shape[1], shape[1]))
    return [scale * left @ rng.normal(size=shape) @ right for _ in range(7)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_kl_shampoo(shape: tuple[int, int], schedule: str, scale: float) -> None:
    block, reference = KLShampoo(0.9), KLShampooReference(0.9, 1e-3)
    state = fresh_state(block, shape)
    moment = np.zeros(shape)
    for step, gradient in enumerate(gradients(shape, scale), start=1):
        feed(block, state, gradient)
        reference.update(gradient)
        if step in SCHEDULES[schedule]:
            block.refresh(state, Damping("trace", 1e-3))
            reference.refresh()
        moment = 0.9 * moment + 0.1 * gradient
        actual = block.precondition(state, torch.from_numpy(moment))
        assert relative(actual, reference.precondition(moment)) < 1e-5, step


@pytest.mark.parametrize("full_every", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soap(shape: tuple[int, int], schedule: str, full_every: int) -> None:
    block, reference = SOAP(0.9, full_every=full_every), SOAPReference(0.9, 1e-8, full_every)
    state = fresh_state(block, shape)
    moment = np.zeros(shape)
    for step, gradient in enumerate(gradients(shape), start=1):
        feed(block, state, gradient)
        reference.update(gradient)
        if step in SCHEDULES[schedule]:
            block.refresh(state, Damping("trace", 1e-3))
            reference.refresh()
        if step <= block.building_steps:
            continue
        moment = 0.9 * moment + 0.1 * gradient
        actual = block.precondition(state, torch.from_numpy(moment))
        assert relative(actual, reference.precondition(moment)) < 1e-5, step


def test_soap_magnifies_round_off_no_more_than_its_definition_does() -> None:
    """After a first gradient with small singular values, whose vectors round-off turns."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(16, 16)))[0] for _ in range(2))
    exact = [(left * np.geomspace(1, 1e-5, 16)) @ right, *rng.normal(size=(6, 16, 16))]
    rounded = [gradient * (1 + rng.choice([-1, 1], gradient.shape) * 2.0**-52) for gradient in exact]

    def update_of_the_block(seen: list[np.ndarray]) -> np.ndarray:
        block = SOAP(0.9)
        state = fresh_state(block, (16, 16))
        for gradient in seen:
            feed(block, state, gradient)
            block.refresh(state, Damping("trace", 1e-3))
        return block.precondition(state, torch.from_numpy(seen[-1])).numpy()

    def update_of_the_reference(seen: list[np.ndarray]) -> np.ndarray:
        reference = SOAPReference(0.9, 1e-8, full_every=10)
        for gradient in seen:
            reference.update(gradient)
            reference.refresh()
        return reference.precondition(seen[-1])

    of_the_block, of_the_reference = (
        relative(update(rounded), update(exact)) for update in (update_of_the_block, update_of_the_reference)
    )
    assert of_the_reference > 1e-10
    assert of_the_block < 10 * of_the_reference
