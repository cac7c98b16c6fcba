"""Privacy that is stated and checked: plugins for `--around`."""
