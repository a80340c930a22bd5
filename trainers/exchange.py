"""What several processes send each other for VICReg's statistics, said once at the start of a run."""

from transformers import TrainerCallback

from modeling_cjepa.losses_cjepa import exchange_bytes, exchange_form

FORMS = {"reduced": "summed", "gathered": "gathered"}


class ExchangeCallback(TrainerCallback):
    """Prints in the main process of several how statistics are exchanged, and how many bytes of a step that takes."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.world_size > 1 and args.process_index == 0:
            num_micro_batches, num_images = args.gradient_accumulation_steps, args.train_batch_size
            if args.exact_accumulation:
                num_images *= num_micro_batches
            shapes = model.statistic_shapes()
            print(describe_exchange(shapes, num_images, args.world_size, num_micro_batches), flush=True)


def describe_exchange(
    shapes: list[tuple[int, int, bool]], num_images: int, num_processes: int, num_micro_batches: int
) -> str:
    """
    One line about the exchange of each level's statistics.

    Args:
        shapes (`list` of `(G, D, bool)`): What the model's `statistic_shapes` gives.
        num_images (`int`): Images of a process that statistics are made of at once.
        num_processes (`int`): How many processes.
        num_micro_batches (`int`): How often a step makes statistics.
    """
    levels = []
    for level, (num_kinds, width, is_gathered) in enumerate(shapes):
        times = num_kinds * num_micro_batches
        of_one = exchange_bytes(num_images, width, num_processes)
        sent = {name: format_bytes(times * number) for name, number in of_one.items()}
        form = "gathered" if is_gathered else exchange_form(num_images, width, num_processes)
        other = min(sent.keys() - {form})
        why = "as batch norm needs them" if is_gathered else f"{FORMS[other]}: {sent[other]}"
        levels.append(f"level {level} {FORMS[form]}, {sent[form]} ({why})")
    return f"statistics over {num_processes} processes, sent by each in a step: {'; '.join(levels)}"


def format_bytes(number: int) -> str:
    """Bytes in the unit that leaves few digits."""
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"
