"""The three probabilities of the masking, checked where they enter."""


def check_probabilities(
    mlm_probability: float, mask_replace_prob: float, random_replace_prob: float
) -> None:
    """Raise ValueError unless each is 0 to 1 and the last two add up to at most 1."""
    for name, value in locals().copy().items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    if mask_replace_prob + random_replace_prob > 1:
        raise ValueError(
            f"mask_replace_prob {mask_replace_prob} and random_replace_prob {random_replace_prob} "
            "add up to more than 1"
        )
