"""What the tests of pictures share."""


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


LONG = "a_model_with_a_name_that_is_longer_than_any_legend_should_have_to_hold"
