"""`cjepa convert`: models of other packages in, ours out."""

import argparse

from trainers.conversion.formats import FORMATS


def add_convert(commands):
    """`cjepa convert SOURCE OUTPUT`."""
    ways_in = "\n".join(f"  {each.name:9}{each.what}" for each in FORMATS if each.reader)
    ways_out = ", ".join(each.name for each in FORMATS if each.writer)
    parser = commands.add_parser(
        "convert",
        usage="cjepa convert SOURCE OUTPUT [--to FORMAT] [--encoder target|context]",
        help="other packages' vision transformers to ours, ours to theirs, each checked by numbers",
        description="Convert a model to another format. What comes in and what is written are run beside the\n"
        "original on random images, and the largest difference is printed; if it is too large, nothing is\n"
        "written. No code of a source is run, and files that need some are refused.\n\nSOURCE may be:\n"
        + ways_in
        + "\n"
        "It is a file of weights, a folder, an id of the Hub, or `timm:` and a name of timm's; its content\n"
        "says which format it is in. What is a start has learned positions or a class token, which ours has\n"
        "not. Without --encoder the authors' files and ours keep context encoder, target encoder and predictor.",
        epilog="examples:  cjepa convert IN1K-vit.h.14-300e.pth.tar converted/vith14\n"
        "           cjepa convert facebook/ijepa_vith14_1k converted/vith14\n"
        "           cjepa convert timm:vit_huge_patch14_gap_224.in1k_ijepa converted/vith14\n"
        "           cjepa convert runs/mine/final converted/ijepa --to ijepa\n"
        "           cjepa convert runs/mine/final converted/mine.pth.tar --to authors\n"
        "           cjepa convert runs/mine/final converted/graph --to onnx\n"
        "           cjepa convert resnet50.pth converted/vicreg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="what to convert")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to write; of --to authors the file, NAME.pth.tar")
    parser.add_argument("--to", metavar="FORMAT", default="cjepa", help=f"one of {ways_out} (default: cjepa)")
    parser.add_argument(
        "--encoder", metavar="NAME", help="`target` or `context`: the encoder to write of a model that has both "
        "(default: target, which the paper of I-JEPA evaluates and whose weights are an average over the steps of "
        "training; without --encoder formats that hold both encoders and the predictor get all of them)",
    )  # fmt: skip
    parser.add_argument(
        "--image_size", metavar="N", type=int,
        help="pixels of a training image's side, where a file does not say: of I-JEPA's authors without positions "
        "(default: 224), of S-JEA's (32 or 64, by the stem), of a ResNet (224, or 32)",
    )  # fmt: skip
    parser.add_argument(
        "--num_attention_heads", metavar="N", type=int,
        help="heads, of a checkpoint of the authors whose width is none of those published",
    )  # fmt: skip
    parser.set_defaults(run=run_convert, parser=parser)


def run_convert(namespace):
    """Converts and says what was checked and what did not map."""
    from pathlib import Path

    from trainers.conversion.converting import convert
    from trainers.conversion.formats import ReadOptions

    options = ReadOptions(image_size=namespace.image_size, num_attention_heads=namespace.num_attention_heads)
    print(f"Reading {namespace.source} ...", flush=True)
    output = Path(namespace.output)
    done = convert(namespace.source, output, namespace.to, namespace.encoder, options)
    print(f"It is {done.source_format.what}.")
    for line in [check.sentence() for check in done.checks] + done.notes:
        print(f"- {line}")
    print(f"Written to {output}: {done.target_format.what}.")
