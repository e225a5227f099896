"""A web page to try SpeeD on: which timesteps a strategy draws and what they count, and images from any checkpoint.

    pip install -e ".[demo]"
    python demo/app.py

It opens at the address that it prints. The folder as it stands is a Space of the Hub too; README.md says how to push
it.
"""

import gradio as gr

from generate_tab import generate_tab
from timesteps_tab import CHART_SCRIPTS, CHART_STYLES, timesteps_tab

INTRODUCTION = """
# SpeeD: which timesteps does a diffusion model train on?

[A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model Training](https://arxiv.org/abs/2405.17403)
draws the timesteps where the noising process has settled less often, and weighs the others by how fast their noise
changes. Look at what that means on any noise schedule, beside the strategies of other papers; or generate images.
"""

THEME = gr.themes.Default(
    primary_hue="blue",
    neutral_hue="stone",
    radius_size="lg",
    # Fonts of the system: the default theme's come from another server.
    font=["Inter", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


def build() -> gr.Blocks:
    """The app with its two tabs."""
    with gr.Blocks(title="SpeeD: timesteps and images", analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Timesteps"):
            timesteps_tab(app)
        with gr.Tab("Images"):
            generate_tab(app)
    return app


if __name__ == "__main__":
    build().launch(theme=THEME, css=CHART_STYLES, head=CHART_SCRIPTS)
