// Package tomlfile reads the TOML files that people write: keys that mean nothing are errors, and every error names the file and
// the line.
package tomlfile

import (
	"bytes"
	"errors"
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
