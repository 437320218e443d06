"""What the sections of a config are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

LARGEST = 2**31 - 1
"""No size, count or step is larger; what is, is a typing error."""


def number(value: Any) -> Any:
    """YAML's true is Python's 1, and pydantic reads "5" as 5: both are more often mistakes than meant."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_type", "a number is wanted")
    return value


Int = Annotated[int, BeforeValidator(number), Field(le=LARGEST)]
Float = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Bool = Annotated[bool, Strict()]


class Section(BaseModel):
    """A section of the config: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
