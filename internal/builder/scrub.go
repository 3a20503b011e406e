package builder

import (
	"context"
	_ "embed"
	"strings"
	"time"

	"banger/internal/fault"
)

const scrubTimeout = 10 * time.Minute

// scrubScript takes away what belongs to the temporary VM alone, as far as it takes a running system to know it. What is
// told by its path is left out by the image store when the file system is written.
//
//go:embed scrub.sh
var scrubScript string

func (j *job) scrub(ctx context.Context, g *guest) error {
	ctx, cancel := context.WithTimeout(ctx, scrubTimeout)
	defer cancel()
	j.log.begin(nil)
	if err := g.run(ctx, "exec sh -eu -s", strings.NewReader(scrubScript)); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fault.Wrap(fault.Unexpected, &stepError{name: StageScrub, reason: err.Error(), tail: j.log.end(), cause: err}, "the VM could not be scrubbed")
	}
	return nil
}
