package cli

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"banger/internal/fault"
)

// outputFormat is the value of -o.
type outputFormat string

const (
	outputTable outputFormat = "table"
	outputJSON  outputFormat = "json"
)

// String, Set and Type make it a pflag.Value.
func (o *outputFormat) String() string { return string(*o) }

func (o *outputFormat) Set(s string) error {
	switch f := outputFormat(s); f {
	case outputTable, outputJSON:
		*o = f
		return nil
	}
	return fault.New(fault.Usage, "must be table or json")
}

func (o *outputFormat) Type() string { return "table|json" }

func (o *outputFormat) json() bool { return *o == outputJSON }

// addOutputFlag adds -o to a command that prints data.
func addOutputFlag(cmd *cobra.Command, o *outputFormat) {
	*o = outputTable
	cmd.Flags().VarP(o, "output", "o", "form of the output: table or json")
	err := cmd.RegisterFlagCompletionFunc("output", fixedCompletions("table", "json"))
	if err != nil {
		panic(err) // the flag exists: it was added above
	}
}

// printJSON writes v, indented, to stdout.
func (e *Env) printJSON(v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the output as JSON: %w", err)
	}
	_, err = fmt.Fprintf(e.Stdout, "%s\n", text)
	return err
}

// print writes text, or v when JSON is wanted.
func (e *Env) print(o outputFormat, v any, text func() string) error {
	if o.json() {
		return e.printJSON(v)
	}
	_, err := fmt.Fprint(e.Stdout, text())
	return err
}
