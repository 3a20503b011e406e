package builder

import (
	"fmt"

	"al.essio.dev/pkg/shellescape"

	"banger/internal/image"
)

// Stale tells what one should know of an image that was built from a recipe: that the recipe is another one by now, which
// stale says as well, or that steps of it were left out. Empty: nothing. An image whose recipe is gone is as good as it was.
func (b *Builder) Stale(i image.Image) (notice string, stale bool) {
	built := i.Manifest.Build
	if built == nil {
		return "", false
	}
	again := "banger image build " + shellescape.Quote(built.Recipe)
	if built.From != "" {
		again += " --from " + built.From
	}
	if recipes, err := chain(built.Recipe); err == nil && hashOf(recipes) != i.Manifest.Recipe {
		what := "its recipe has changed since it was built"
		if recipes[0].ListHash != built.ListHash {
			what = "its recipe's list of packages has changed since it was built"
		}
		return what + "; build it anew: " + again, true
	}
	if n := len(built.Incomplete); n > 0 {
		return fmt.Sprintf("steps of its recipe were left out: %d; to try again: %s", n, again), false
	}
	return "", false
}
