"""What a run may be asked for: `TwhinConfig`, its sections, recipes, and which file it is read from."""

from twhin_pipeline.config.twhin_config import (
    TwhinConfig,
    apply_override,
    as_override,
    as_yaml_line,
    current_path,
    default_config_path,
    load_config,
    parse_config,
)

__all__ = [
    "TwhinConfig",
    "apply_override",
    "as_override",
    "as_yaml_line",
    "current_path",
    "default_config_path",
    "load_config",
    "parse_config",
]
