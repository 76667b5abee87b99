"""Where modelhub's own data files are: preset cards, and later the embedded tokenizers and the recipes."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def resource(name: str) -> Path:
    """The folder `name` of modelhub's data ("presets"), in a wheel as well as in a checkout or an editable install."""
    shipped = _PACKAGE / "_resources" / name
    if shipped.is_dir():
        return shipped
    root = _PACKAGE.parent
    # The parent of an installed package is site-packages, where a folder of this name would be somebody else's.
    if (root / "pyproject.toml").is_file() and (root / name).is_dir():
        return root / name
    raise FileNotFoundError(f"modelhub's data folder {name!r} is missing at {shipped}; install modelhub again")
