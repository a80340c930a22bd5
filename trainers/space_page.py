"""The page of a Space: a tab each for attention, principal components, nearest images and the levels side by side.

The one module that needs gradio (`pip install "cjepa[space]"`). A visitor's image is kept while the page is open.
"""

import functools
import html
from collections.abc import Callable

import gradio as gr

from trainers.errors import InputError, plain_message
from trainers.space import MAX_PICTURES, Explorer, read_upload

STYLE = """
.gradio-container {width: 100% !important; max-width: 1080px !important; margin: 0 auto !important}
.shown .image-frame, .shown button {width: 100%}
.shown .icon-button-wrapper {display: none}
.shown img {width: auto; max-width: 100%; height: auto}
.pictures .grid-wrap {min-height: 0 !important; max-height: none !important; overflow: visible; padding: 8px}
.pictures .grid-container {padding: 0; grid-template-columns: repeat(auto-fill, minmax(max(96px, 20%), 1fr))}
.pictures .thumbnail-item {aspect-ratio: auto; height: auto; width: 100%; display: block}
.pictures .thumbnail-item img {aspect-ratio: 1; height: auto; width: 100%}
.pictures .caption-label {position: static; max-width: none; border: 0; text-align: center; padding: 3px}
.tab-container button {padding: 0 9px}
.examples .grid-container {grid-auto-rows: auto; grid-template-columns: repeat(auto-fill, minmax(64px, 1fr))}
.pairs .grid-container {grid-template-columns: repeat(auto-fill, minmax(240px, 1fr))}
.pairs .thumbnail-item img {aspect-ratio: auto}
"""
# fonts of the visitor's machine: those of gradio's own theme are fetched from elsewhere
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# one event at a time: all use the one encoder
_ONE = {"concurrency_id": "encoder", "concurrency_limit": 1, "show_progress": "minimal", "api_visibility": "private"}
_STILL = {"interactive": False, "format": "png", "buttons": [], "show_label": False}


def build_page(explorer: Explorer) -> gr.Blocks:
    """
    The page of a model.

    Args:
        explorer ([`Explorer`]): The model, with its gallery embedded.

    Returns:
        `gr.Blocks`: To be given to [`launch_page`].
    """
    with gr.Blocks(title=f"cjepa: {explorer.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# What an encoder sees\n{explorer.summary}")
        for name, fill in (
            ("Attention", _attention), ("PCA", _components), ("Nearest", _nearest), ("Levels", _levels)
        ):  # fmt: skip
            with gr.Tab(name):
                fill(explorer)
    return page


def launch_page(page: gr.Blocks, port: int | None = None):
    """Serves a page until the process is interrupted; at the first free port from 7860 when none is given."""
    theme = gr.themes.Default(primary_hue="teal", **_FONTS)
    page.launch(server_port=port, theme=theme, css=STYLE, footer_links=[], max_file_size="20mb")


def _attention(explorer: Explorer):
    level = explorer.chosen_level
    try:
        seen, laid_over = explorer.attention(explorer.examples[0], level)
    except InputError as error:
        gr.Markdown(plain_message(error))
        return
    gr.Markdown("Where one layer looks, the mean of its heads. **Click on a patch** to see what it attends to; before "
                "that it is the share of attention that each patch receives, from all patches.")  # fmt: skip
    chosen, picked = _choice(explorer)
    query = gr.State(None)
    with gr.Row():
        levels = _level_choice(list(range(explorer.num_levels)), level)
        layer = gr.Slider(step=1, label="Layer", min_width=200, **_layers(explorer, level))
        mean = gr.Button("From all patches", size="sm", min_width=160)
    with gr.Row():
        pictures = [
            _picture(seen, "What the model sees", elem_id="seen"),
            _picture(laid_over, "Attention", elem_id="attention"),
        ]

    def ask(level: int, event: gr.SelectData):
        return explorer.patch_at(level, *event.index)

    def change_level(level: int):
        return gr.Slider(**_layers(explorer, level)), None

    draw = _told(explorer.attention), [chosen, levels, layer, query], pictures
    for event in (
        *(each.success(lambda: None, None, query, **_ONE) for each in picked),
        *(picture.select(ask, levels, query, **_ONE) for picture in pictures),
        mean.click(lambda: None, None, query, **_ONE),
        levels.input(change_level, levels, [layer, query], **_ONE),
    ):
        event.success(*draw, **_ONE)
    layer.input(*draw, trigger_mode="always_last", **_ONE)


def _layers(explorer: Explorer, level: int) -> dict:
    """The range of a level's layers, the last one chosen."""
    last = explorer.num_layers(level) - 1
    return {"minimum": 0, "maximum": max(last, 1), "value": last, "visible": last > 0}


def _components(explorer: Explorer):
    refusals = _refusals(explorer)
    drawable = [level for level, refusal in refusals.items() if refusal is None]
    if not drawable:
        gr.Markdown(refusals[explorer.chosen_level])
        return
    level = explorer.chosen_level if explorer.chosen_level in drawable else drawable[-1]

    def draw(pictures, level):
        pairs, shares = explorer.components(pictures, level)
        return (
            pairs,
            f"They explain {sum(shares):.0%} of the variance ({', '.join(f'{each:.0%}' for each in shares)}).",
        )

    pairs, note = draw(explorer.examples, level)
    gr.Markdown("Patch tokens as colours: their first three principal components as red, green and blue, of all "
                f"images together, so that a colour means the same in each. Give up to {MAX_PICTURES}.")  # fmt: skip
    chosen = gr.State(explorer.examples)
    levels = _level_choice(drawable, level)
    shown = _pictures(pairs, "", "pairs", elem_id="pca")
    said = gr.Markdown(note)
    given = _upload(lambda paths: [read_upload(path) for path in paths], chosen, file_count="multiple")
    again = gr.Button("The examples", size="sm")
    for event in (given, again.click(lambda: explorer.examples, None, chosen, **_ONE)):
        event.success(_told(draw), [chosen, levels], [shown, said], **_ONE)
    levels.input(_told(draw), [chosen, levels], [shown, said], **_ONE)


def _refusals(explorer: Explorer) -> dict[int, str | None]:
    """Why the tokens of a level cannot be drawn, None where they can."""
    refusals = dict.fromkeys(range(explorer.num_levels))
    for level in refusals:
        try:
            explorer.components(explorer.examples, level)
        except InputError as error:
            refusals[level] = plain_message(error)
    return refusals


def _nearest(explorer: Explorer):
    level = explorer.chosen_level

    def find(picture, level):
        return explorer.seen(picture), explorer.nearest(picture)[level]

    query, found = find(explorer.examples[0], level)
    gr.Markdown(f"The images nearest to one, of {len(explorer.gallery):,} of {explorer.gallery.name}: by the cosine "
                "of their embeddings, which is the number below each.")  # fmt: skip
    chosen, picked = _choice(explorer)
    levels = _level_choice(list(range(explorer.num_levels)), level)
    with gr.Row():
        with gr.Column(scale=2, min_width=240):
            shown = _picture(query, "Image", elem_id="query")
        with gr.Column(scale=3, min_width=300):
            near = _pictures(found, "Nearest images", elem_id="nearest")
    for event in picked:
        event.success(_told(find), [chosen, levels], [shown, near], **_ONE)
    levels.input(_told(find), [chosen, levels], [shown, near], **_ONE)


def _levels(explorer: Explorer):
    if explorer.num_levels == 1:
        gr.Markdown("This model has one level, so there is nothing to set beside it; give a stack, such as that of "
                    "`cjepa pretrain cjepa_stack_scenes`.")  # fmt: skip
        return
    refusals = _refusals(explorer)

    def draw(picture):
        """For each level its picture, where there is one, and its nearest images."""
        together = [picture, *explorer.examples]
        shown = []
        for level, found in enumerate(explorer.nearest(picture)):
            shown += [] if refusals[level] else explorer.components(together, level)[0][:1]
            shown.append(found)
        return shown

    gr.Markdown("One image by each level, the lowest first: its patch tokens as colours, by components shared with "
                "the examples, and the images nearest to it.")  # fmt: skip
    chosen, picked = _choice(explorer)
    values, shown = iter(draw(explorer.examples[0])), []
    with gr.Row():
        for level, refusal in refusals.items():
            with gr.Column(min_width=300):
                if refusal:
                    gr.Markdown(f"**Level {level}.** {refusal}")
                else:
                    shown.append(_picture(next(values), f"Level {level}", elem_id=f"pca{level}"))
                shown.append(_pictures(next(values), f"Nearest by level {level}", elem_id=f"nearest{level}"))
    for event in picked:
        event.success(_told(draw), chosen, shown, **_ONE)


def _choice(explorer: Explorer) -> tuple[gr.State, list]:
    """Examples to click on and a place for a file: the image that is chosen, and the two events that choose one."""
    chosen = gr.State(explorer.examples[0])
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            examples = _pictures(
                [explorer.seen(each) for each in explorer.examples], "", "examples", allow_preview=False
            )
        with gr.Column(scale=1, min_width=200):
            given = _upload(read_upload, chosen)

    def pick(event: gr.SelectData):
        return explorer.examples[event.index]

    return chosen, [examples.select(pick, None, chosen, **_ONE), given]


def _picture(pixels, title: str, **settings) -> gr.Image:
    """One picture below its title, which would hide a corner of it as gradio's label."""
    with gr.Column(min_width=260):
        gr.Markdown(f"**{title}**")
        return gr.Image(pixels, label=title, elem_classes="shown", **_STILL, **settings)


def _pictures(pictures: list, title: str, *classes: str, **settings) -> gr.Gallery:
    """Small pictures below their title, if they have one."""
    if title:
        gr.Markdown(f"**{title}**")
    classes = ["pictures", *classes]
    return gr.Gallery(pictures, label=title, elem_classes=classes, height="auto", **_STILL, **settings)


def _upload(read: Callable, chosen: gr.State, **settings):
    """A place for files, which is empty again when they were read; the event that chose what they hold."""
    file = gr.File(show_label=False, file_types=["image"], height=122, **settings)
    given = file.upload(_told(read), file, chosen, **_ONE)
    # after an error gradio 6.31 does not call what comes by `then`
    given.failure(lambda: None, None, file, **_ONE)
    given.success(lambda: None, None, file, **_ONE)
    return given


def _level_choice(levels: list[int], chosen: int) -> gr.Radio:
    """Which level; there is nothing to see of it where there is one."""
    return gr.Radio(
        [(f"Level {level}", level) for level in levels], value=chosen, label="Level", visible=len(levels) > 1
    )


def _told(handler: Callable) -> Callable:
    """A handler whose `InputError` becomes a sentence on the page."""

    @functools.wraps(handler)
    def told(*arguments):
        try:
            return handler(*arguments)
        except InputError as error:
            # the page takes HTML, and the sentence may hold a file's name
            raise gr.Error(html.escape(plain_message(error)), title="", print_exception=False) from error

    return told
