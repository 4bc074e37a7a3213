"""`kdcli eval` on a user's own images: the same scores from a folder, a table of paths, and encoded bytes."""

import pyarrow as pa
import pyarrow.parquet
from conftest import World
from image_rows import encoded, pictures


def test_scores_are_the_same_whatever_images_are_kept_in(world: World):
    model = world.model("viewer")
    content = [encoded(image) for image in pictures(20)]
    labels = [("no", "yes")[n % 3 == 0] for n in range(20)]
    files = [
        world.write(f"photos/{label}/{n:02}.png", one)
        for n, (one, label) in enumerate(zip(content, labels, strict=True))
    ]
    world.csv("rows.csv", list(zip(files, labels, strict=True)), header="file,label")
    pa.parquet.write_table(pa.table({"image": content, "label": labels}), world.folder / "rows.parquet")
    # Another folder than the table's: its paths start there all the same.
    (world.folder / "elsewhere").mkdir()
    world.monkeypatch.chdir(world.folder / "elsewhere")
    found = []
    for data, options in (("photos", []), ("rows.csv", ["--set", "image=file"]), ("rows.parquet", [])):
        outcome = world.call("eval", model, "--data", world.folder / data, *options, "--json")
        assert outcome.code == 0, outcome.err
        found.append({name: value for name, value in outcome.json.items() if "score" in name})
    assert found[0] and found[0] == found[1] == found[2]
