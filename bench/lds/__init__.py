"""A benchmark of attribution that two cores can make: models of 16 x 16 images, retrained on halves of them."""
