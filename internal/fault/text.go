package fault

import (
	"strings"
	"unicode"
)

// Printable makes text that comes from elsewhere (a guest, a server, a file) fit to stand in a line that people read: the
// ends of lines and tabs become spaces; what is no UTF-8, control characters and what turns the direction of writing are
// left out, so that it can do nothing to a terminal.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case unicode.IsGraphic(r):
			return r
		}
		return -1
	}, strings.ToValidUTF8(text, ""))
}
