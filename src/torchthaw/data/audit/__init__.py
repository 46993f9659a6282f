"""What is wrong with a data set: one look at every image, and findings with a verdict and what to do."""
