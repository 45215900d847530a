"""Foreign weights: names, layouts and files of others to and from our models. Nothing that is read
is executed."""
