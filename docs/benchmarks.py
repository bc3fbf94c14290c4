"""The page about the benchmarks is the README of their folder, with its pictures."""

from pathlib import Path

from mkdocs.structure.files import File


_FOLDER = Path(__file__).parent.parent / "benchmarks"


def on_files(files, *, config):
    """Called by mkdocs: adds the page and the pictures that it links to."""
    text = (_FOLDER / "README.md").read_text()
    for picture in sorted(_FOLDER.glob("results/*.png")):
        inside = f"results/{picture.name}"
        if f"({inside})" in text:
            name = f"figures/{picture.name}"
            files.append(File.generated(config, name, abs_src_path=str(picture)))
            text = text.replace(f"({inside})", f"({name})")
    files.append(File.generated(config, "benchmarks.md", content=text))
    return files
