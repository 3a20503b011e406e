// Package images holds the recipes of the images that banger can build: a directory each.
package images

import "embed"

// Recipes has a directory for each recipe.
//
//go:embed all:dev all:small
var Recipes embed.FS
