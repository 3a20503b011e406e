package builder

import (
	"fmt"

	"banger/internal/image"
)

// Stale tells what one should know of an image that was built from a recipe: that the recipe is another one by now, or
// that steps of it were left out. Empty: nothing. An image whose recipe is gone is as good as it was.
func (b *Builder) Stale(i image.Image) string {
	built := i.Manifest.Build
	if built == nil {
		return ""
	}
	ref := built.Recipe
	if recipes, err := chain(ref); err == nil && hashOf(recipes) != i.Manifest.Recipe {
		what := "its recipe has changed since it was built"
		if recipes[0].ListHash != built.ListHash {
			what = "its recipe's list of packages has changed since it was built"
		}
		return fmt.Sprintf("%s; build it anew: banger image build %s", what, ref)
	}
	if n := len(built.Incomplete); n > 0 {
		return fmt.Sprintf("%d optional steps of its recipe were left out; to try again: banger image build %s", n, ref)
	}
	return ""
}
