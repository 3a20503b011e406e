package fakefc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// enum is a string type with a closed set of values, in upper and lower case as given.
type enum interface{ variants() []string }

// loose is a struct that takes unknown fields.
type loose interface{ loose() }

// strict fills bodies as Firecracker's deserializer does. Fields are marked by tags: `fc:"required"`, `fc:"since=1.16"`.
// A pointer is an optional field that takes null; no other one does.
type strict struct{ version version }

// node is a JSON value and where it ends.
type node struct {
	value  any // string, json.Number, bool, nil, []node or []member
	offset int64
}

type member struct {
	name  string
	value node
	end   int64 // of the name
}

// decode fills what to points to. Its errors say where in the body they are.
func (s strict) decode(body []byte, to any) error {
	n, err := parse(body)
	if err != nil {
		return err
	}
	target := reflect.TypeOf(to).Elem()
	if err := s.check(n, target); err != nil {
		var at *misfit
		if errors.As(err, &at) {
			return fmt.Errorf("%s %s", at.text, place(body, at.offset))
		}
		return err
	}
	return json.Unmarshal(body, to)
}

// misfit is a value that does not fit.
type misfit struct {
	text   string
	offset int64
}

func (m *misfit) Error() string { return m.text }

func place(body []byte, offset int64) string {
	before := body[:min(int(offset), len(body))]
	line := 1 + bytes.Count(before, []byte("\n"))
	column := len(before) - (bytes.LastIndexByte(before, '\n') + 1)
	return fmt.Sprintf("at line %d column %d", line, column)
}

func parse(body []byte) (node, error) {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	n, err := parseValue(d)
	if err == nil {
		rest := bytes.TrimLeft(body[n.offset:], " \t\r\n")
		if len(rest) > 0 {
			return n, fmt.Errorf("trailing characters %s", place(body, int64(len(body)-len(rest)+1)))
		}
		return n, nil
	}
	at := d.InputOffset()
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax):
		return n, fmt.Errorf("expected value %s", place(body, syntax.Offset))
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return n, fmt.Errorf("EOF while parsing a value %s", place(body, at))
	}
	return n, err
}

func parseValue(d *json.Decoder) (node, error) {
	token, err := d.Token()
	if err != nil {
		return node{}, err
	}
	switch token {
	case json.Delim('{'):
		return parseObject(d)
	case json.Delim('['):
		items := []node{}
		for d.More() {
			n, err := parseValue(d)
			if err != nil {
				return n, err
			}
			items = append(items, n)
		}
		_, err := d.Token()
		return node{items, d.InputOffset()}, err
	}
	return node{token, d.InputOffset()}, nil
}

func parseObject(d *json.Decoder) (node, error) {
	members := []member{}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return node{}, err
		}
		name, _ := token.(string) // the decoder takes nothing else there
		end := d.InputOffset()
		n, err := parseValue(d)
		if err != nil {
			return n, err
		}
		members = append(members, member{name, n, end})
	}
	_, err := d.Token()
	return node{members, d.InputOffset()}, err
}

var rawMessage = reflect.TypeFor[json.RawMessage]()

func (s strict) check(n node, t reflect.Type) error {
	if t == rawMessage {
		return nil
	}
	if e, ok := reflect.Zero(t).Interface().(enum); ok && t.Kind() != reflect.Pointer {
		return checkEnum(n, e.variants())
	}
	switch t.Kind() {
	case reflect.Pointer:
		if n.value == nil {
			return nil
		}
		return s.check(n, t.Elem())
	case reflect.Struct:
		return s.checkStruct(n, t)
	case reflect.Slice:
		items, ok := n.value.([]node)
		if !ok {
			return n.wrongType("a sequence")
		}
		for _, item := range items {
			if err := s.check(item, t.Elem()); err != nil {
				return err
			}
		}
		return nil
	case reflect.Map:
		members, ok := n.value.([]member)
		if !ok {
			return n.wrongType("a map")
		}
		for _, m := range members {
			if err := s.check(m.value, t.Elem()); err != nil {
				return err
			}
		}
		return nil
	}
	return checkScalar(n, t)
}

func checkScalar(n node, t reflect.Type) error {
	switch t.Kind() {
	case reflect.String:
		if _, ok := n.value.(string); !ok {
			return n.wrongType("a string")
		}
	case reflect.Bool:
		if _, ok := n.value.(bool); !ok {
			return n.wrongType("a boolean")
		}
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		want := fmt.Sprintf("u%d", t.Bits())
		text, ok := n.value.(json.Number)
		if !ok || strings.ContainsAny(text.String(), ".eE") {
			return n.wrongType(want)
		}
		if _, err := strconv.ParseUint(text.String(), 10, t.Bits()); err != nil {
			return &misfit{fmt.Sprintf("invalid value: integer `%s`, expected %s", text, want), n.offset}
		}
	default:
		panic("a body of kind " + t.Kind().String())
	}
	return nil
}

func checkEnum(n node, variants []string) error {
	text, ok := n.value.(string)
	if !ok {
		return &misfit{"expected value", n.offset}
	}
	if !slices.Contains(variants, text) {
		return &misfit{fmt.Sprintf("unknown variant `%s`, expected %s", text, oneOf(variants)), n.offset}
	}
	return nil
}

func (n node) wrongType(want string) error {
	got := ""
	switch v := n.value.(type) {
	case nil:
		got = "null"
	case string:
		got = fmt.Sprintf("string %q", v)
	case bool:
		got = fmt.Sprintf("boolean `%t`", v)
	case json.Number:
		got = fmt.Sprintf("integer `%s`", v)
		if strings.ContainsAny(v.String(), ".eE") {
			got = fmt.Sprintf("floating point `%s`", v)
		}
	case []node:
		got = "sequence"
	case []member:
		got = "map"
	}
	return &misfit{fmt.Sprintf("invalid type: %s, expected %s", got, want), n.offset}
}

func oneOf(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = "`" + n + "`"
	}
	switch len(quoted) {
	case 0:
		return "there are no fields"
	case 1:
		return quoted[0]
	case 2:
		return quoted[0] + " or " + quoted[1]
	}
	return "one of " + strings.Join(quoted, ", ")
}

func (s strict) checkStruct(n node, t reflect.Type) error {
	members, ok := n.value.([]member)
	if !ok {
		return n.wrongType("struct " + t.Name())
	}
	fields, required := s.fields(t)
	seen := map[string]bool{}
	for _, m := range members {
		field, known := fields[m.name]
		if !known {
			if _, ok := reflect.Zero(t).Interface().(loose); ok {
				continue
			}
			return &misfit{fmt.Sprintf("unknown field `%s`, expected %s", m.name, oneOf(s.names(t))), m.end}
		}
		if seen[m.name] {
			return &misfit{fmt.Sprintf("duplicate field `%s`", m.name), m.end}
		}
		seen[m.name] = true
		if err := s.check(m.value, field.Type); err != nil {
			return err
		}
	}
	for _, name := range required {
		if !seen[name] {
			return &misfit{fmt.Sprintf("missing field `%s`", name), n.offset}
		}
	}
	return nil
}

// fields are those that this version knows, and the names of those that must be there.
func (s strict) fields(t reflect.Type) (fields map[string]reflect.StructField, required []string) {
	fields = map[string]reflect.StructField{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		tag := f.Tag.Get("fc")
		if tag == "since=clock" && !s.version.clockRealtime() {
			continue
		}
		if from, ok := strings.CutPrefix(tag, "since="); ok && from != "clock" && !s.version.atLeast(since(from)) {
			continue
		}
		fields[name] = f
		if tag == "required" {
			required = append(required, name)
		}
	}
	return fields, required
}

func (s strict) names(t reflect.Type) []string {
	var names []string
	fields, _ := s.fields(t)
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		if _, ok := fields[name]; ok {
			names = append(names, name)
		}
	}
	return names
}
