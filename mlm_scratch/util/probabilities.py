"""The share of tokens to mask, as users write it."""


def mask_rates(mlm_probability: float | str) -> tuple[float, float]:
    """Return the share of tokens to mask at the start and at the end of a run.

    "0.3:0.15" decreases linearly from 0.3 to 0.15; 0.15 is constant.

    Raises:
        ValueError: mlm_probability has neither form, or a share is not above 0 and at most 1.
    """
    first, _, last = str(mlm_probability).partition(":")
    try:
        rates = float(first), float(last or first)
    except ValueError as error:
        raise ValueError(
            f"mlm_probability must be a share, or two as in 0.3:0.15, got {mlm_probability!r}"
        ) from error
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"mlm_probability must be above 0 and at most 1, got {rate}")
    return rates
