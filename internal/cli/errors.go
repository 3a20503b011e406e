package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"banger/internal/fault"
)

// severalErrors holds the failures of a command that works on several things at once, in the
// order in which the things were named. Its exit code is the first one's.
type severalErrors []error

func (s severalErrors) Error() string { return errors.Join(s...).Error() }

// exitCode maps an error to the published exit codes.
func exitCode(err error) int {
	var several severalErrors
	if errors.As(err, &several) && len(several) > 0 {
		err = several[0]
	}
	if exit := asExit(err); exit != nil {
		return exit.code
	}
	return fault.ExitCode(err)
}

// printError prints what went wrong and what to do next.
func (e *Env) printError(err error) {
	var several severalErrors
	if errors.As(err, &several) {
		for _, one := range several {
			e.printError(one)
		}
		return
	}
	if exit := asExit(err); exit != nil && exit.text != "" {
		fmt.Fprintf(e.Stderr, "banger: error: %s\n", harmless(exit.text))
		return
	} else if err == nil || exit != nil {
		return
	}
	fmt.Fprintf(e.Stderr, "banger: error: %s\n", harmless(errorText(err)))
	if hint := hintFor(err); hint != "" {
		fmt.Fprintf(e.Stderr, "banger: hint: %s\n", harmless(hint))
	}
}

func errorText(err error) string {
	var f *fault.Error
	switch {
	case errors.As(err, &f):
		return strings.TrimSpace(err.Error())
	case errors.Is(err, context.Canceled):
		return "interrupted"
	case errors.Is(err, context.DeadlineExceeded):
		return "it took too long"
	}
	return strings.TrimSpace(err.Error())
}

func hintFor(err error) string {
	if hint := fault.HintOf(err); hint != "" {
		return hint
	}
	if fault.KindOf(err) == fault.Unexpected {
		return `this looks like a bug in banger; "banger daemon logs" may tell more`
	}
	return ""
}

// outputFault tells of a standard output that cannot be written to, a full disk for instance. It is the only
// file this process writes.
func outputFault(err error) error {
	var file *fs.PathError
	var known *fault.Error
	if errors.As(err, &known) || !errors.As(err, &file) || file.Op != "write" {
		return err
	}
	return fault.Wrap(fault.Precondition, file.Err, "cannot write the output")
}

// clockSlack is how far two parties may differ about the end of one time limit.
const clockSlack = 100 * time.Millisecond

// explain replaces a bare "context ended" by the reason the context carries, such as the time
// limit of the command.
func explain(ctx context.Context, err error) error {
	var several severalErrors
	if err == nil || errors.As(err, &several) {
		return err // several were explained one by one
	}
	// The daemon keeps the same time limit, and may have noticed its end a moment before us.
	if deadline, ok := ctx.Deadline(); ok && fault.KindOf(err) == fault.Timeout && time.Until(deadline) < clockSlack {
		<-ctx.Done()
	}
	if ctx.Err() == nil {
		return err
	}
	cause := context.Cause(ctx)
	switch kind := fault.KindOf(err); {
	case kind != fault.Timeout && kind != fault.Interrupted && kind != fault.Unexpected:
		return err
	case errors.Is(cause, context.Canceled):
		return fault.New(fault.Interrupted, "interrupted")
	}
	return cause
}

// flagError turns pflag's complaint into a usage fault with the nearest flag as a hint.
func flagError(cmd *cobra.Command, err error) error {
	f := fault.New(fault.Usage, "%s", firstLine(err.Error()))
	var unknown *pflag.NotExistError
	var bad *pflag.InvalidValueError
	if errors.As(err, &bad) {
		f = fault.New(fault.Usage, "--%s cannot be %q: %s", bad.GetFlag().Name, bad.GetValue(), wanted(bad.GetFlag().Value.Type()))
	}
	if errors.As(err, &unknown) {
		if near := nearestFlag(cmd, unknown.GetSpecifiedName()); near != "" {
			return f.WithHint("did you mean --%s?", near)
		}
		if takesGuestCommand(cmd) {
			return f.WithHint("put -- before the command that runs in the guest")
		}
	}
	return f.WithHint("see %q", cmd.CommandPath()+" --help")
}

// wanted tells what a flag of a type takes.
func wanted(flagType string) string {
	switch flagType {
	case "int32":
		return "it takes a whole number"
	case "duration":
		return "it takes a time like 90s or 5m"
	case "bool":
		return "it takes true or false"
	}
	return "it takes " + strings.ReplaceAll(flagType, "|", " or ")
}

func takesGuestCommand(cmd *cobra.Command) bool { return strings.Contains(cmd.Use, "-- ") }

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

func nearestFlag(cmd *cobra.Command, name string) string {
	best, distance := "", 3
	if len(name) < 2 {
		return ""
	}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if d := editDistance(f.Name, name); d < distance && !f.Hidden {
			best, distance = f.Name, d
		}
	})
	return best
}

// editDistance is the Levenshtein distance.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// unknownCommand is the fault for a word that is no command below cmd.
func unknownCommand(cmd *cobra.Command, word string) error {
	f := fault.New(fault.Usage, "unknown command %q for %q", word, cmd.CommandPath())
	if near := nearestCommand(cmd, word); near != "" {
		return f.WithHint("did you mean %q?", near)
	}
	return f.WithHint("see %q", cmd.CommandPath()+" --help")
}

// nearestCommand looks below cmd first, then for the word as a verb below another noun:
// "banger ls" means "banger vm list".
func nearestCommand(cmd *cobra.Command, word string) string {
	if near := nearestChild(cmd, word, min(3, 1+len(word)/2)); near != nil { // the shorter, the closer
		return near.CommandPath()
	}
	if cmd.HasParent() {
		return ""
	}
	nouns := slices.Clone(cmd.Commands())
	slices.SortStableFunc(nouns, func(a, b *cobra.Command) int { return rank(a) - rank(b) })
	for _, noun := range nouns {
		if near := nearestChild(noun, word, 1); near != nil && !noun.Hidden {
			return near.CommandPath()
		}
	}
	return ""
}

// rank puts the noun most often meant first.
func rank(noun *cobra.Command) int {
	if noun.Name() == "vm" {
		return 0
	}
	return 1
}

// nearestChild returns the sub-command whose name or alias is less than limit edits away.
func nearestChild(cmd *cobra.Command, word string, limit int) *cobra.Command {
	var best *cobra.Command
	for _, child := range cmd.Commands() {
		if child.Hidden {
			continue
		}
		for _, name := range append(child.Aliases, child.Name()) {
			if d := editDistance(name, word); d < limit {
				best, limit = child, d
			}
		}
	}
	return best
}

// notice tells something worth knowing on stderr.
func (e *Env) notice(text string) {
	if !e.quiet {
		fmt.Fprintf(e.Stderr, "banger: %s\n", fault.Printable(text))
	}
}
