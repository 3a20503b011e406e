// Package tomlfile reads the TOML files that people write: keys that mean nothing are errors, and every error names the file and
// the line.
package tomlfile

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"banger/internal/fault"
)

// Decode reads text, which is the content of the file at path, into v. What is wrong is a Usage fault.
func Decode(path string, text []byte, v any) error {
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(v)
	var unknown *toml.StrictMissingError
	var decode *toml.DecodeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &unknown) && len(unknown.Errors) > 0:
		line, _ := unknown.Errors[0].Position()
		return fault.New(fault.Usage, "%s:%d: unknown key %q", path, line, strings.Join(unknown.Errors[0].Key(), ".")).
			WithHint("remove or correct the line")
	case errors.As(err, &decode):
		line, column := decode.Position()
		return fault.New(fault.Usage, "%s:%d:%d: %s", path, line, column, decode.Error()).WithHint("correct the line")
	}
	return fault.Wrap(fault.Usage, err, "%s", path).WithHint("correct the file")
}

// Line tells on which line of text a key outside of all tables gets its value; 0: on none.
func Line(text []byte, key string) int {
	var unknown *toml.StrictMissingError // as nothing is known here, all keys are in it
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&struct{}{}); !errors.As(err, &unknown) {
		return 0
	}
	for _, e := range unknown.Errors {
		if slices.Equal(e.Key(), []string{key}) {
			line, _ := e.Position()
			return line
		}
	}
	return 0
}
