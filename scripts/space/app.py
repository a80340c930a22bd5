"""A published model to look at in a browser, here or as a Space: python scripts/space/app.py runs/mine/final"""

import argparse
import os
import sys

from trainers.errors import InputError, plain_message
from trainers.space import Explorer, check_port, page_module


def main() -> int:
    """Embeds the gallery and serves the page; a user's mistake ends it with one sentence and exit status 2."""
    parser = argparse.ArgumentParser(
        description="Serve a page with attention maps, principal components and nearest images of a model, and what "
        "its levels give side by side.",
        epilog="examples:  python scripts/space/app.py runs/mine/final\n"
        "           python scripts/space/app.py runs/stack/final --gallery my/photos --port 7861\n"
        "           CJEPA_MODEL=user/model python scripts/space/app.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=os.environ.get("CJEPA_MODEL"),
        help="a folder such as runs/mine/final, or the id of a model on the Hub (default: the variable CJEPA_MODEL)",
    )
    parser.add_argument(
        "--gallery",
        metavar="FOLDER",
        default=os.environ.get("CJEPA_GALLERY") or None,
        help="images to look for the nearest ones among, and to take examples of (default: the variable "
        "CJEPA_GALLERY, else rendered scenes)",
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    namespace = parser.parse_args()
    if not namespace.model:
        parser.error("no model is named; give a folder or the id of one on the Hub, or set CJEPA_MODEL.")
    try:
        check_port(namespace.port)
        page = page_module()  # before anything takes long
        page.launch_page(page.build_page(Explorer(namespace.model, namespace.gallery)), namespace.port)
    except InputError as error:
        print(f"\napp.py: {plain_message(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
