"""Continue prompts: `sampling` draws an id, `engine` is ids to ids, `text` is text to text."""

from blackmamba.generate.engine import generate, read_prompts, stream
from blackmamba.generate.sampling import SamplingConfig
from blackmamba.generate.text import generate_text

__all__ = ["SamplingConfig", "generate", "generate_text", "read_prompts", "stream"]
