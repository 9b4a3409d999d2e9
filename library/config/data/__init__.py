"""The data as users write it: data sets, their folders and keys, masks, shares, the prompts of a slider."""
