package fakefc

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"unicode"
)

// route is one request of the API.
type route struct {
	pre, post bool   // whether it is answered before and after the start of the guest
	hot       bool   // after the start only with --enable-pci, since 1.16
	boot      bool   // asking for it, successfully or not, forbids to load a snapshot later
	id        bool   // the path names a resource
	since     string // the release it came with
	body      any    // a value of the body's type; nil: there is none
	optional  bool   // the body may be missing
	// run does it. body points to a value of the body's type. What it returns is answered as JSON, nil as 204.
	run func(m *machine, q *query) (any, error)
}

// query is a request with its route found and its body understood.
type query struct {
	route      route
	id         string
	body       any
	deprecated bool
	fatal      bool // an error ends the process once it is answered
}

// rejected is an error with its status; all others are answered with 400.
type rejected struct {
	status int
	text   string
}

func (r rejected) Error() string { return r.text }

const (
	textBefore = "The requested operation is not supported before starting the microVM."
	textAfter  = "The requested operation is not supported after starting the microVM."
)

// find finds the route of a request: its name is the method and the first word of the path, and the second one where
// that is looked at. All further ones are ignored.
func (m *machine) find(r request) (*query, error) {
	path := strings.Split(strings.TrimLeft(r.path, "/"), "/")
	first, second := path[0], ""
	if len(path) > 1 {
		second = path[1]
	}
	if r.method == "GET" && r.hasBody {
		return nil, fail("GET request cannot have a body.")
	}
	name := r.method + " /" + first
	if err := checkSecond(r, first, second); err != nil {
		return nil, err
	}
	if full := name + "/" + second; second != "" && routes[full].run != nil {
		name = full
	}
	found, known := routes[name]
	bodyless := !r.hasBody && !found.optional
	switch {
	case (r.method == "PUT" || r.method == "PATCH") && bodyless:
		return nil, fail("Empty %s request.", r.method)
	case r.method == "DELETE" && r.hasBody:
		return nil, fail("Empty Delete request.")
	case !known || found.since != "" && !m.version.atLeast(since(found.since)):
		return nil, fail("Invalid request method and/or path: %s %s.", r.method, first)
	}
	return m.understand(found, second, r)
}

// checkSecond refuses second words that are not known where they are looked at.
func checkSecond(r request, first, second string) error {
	switch r.method + " /" + first {
	case "GET /balloon":
		if second != "" && second != "statistics" && second != "hinting" {
			return fail("Unrecognized GET request path `%s`.", second)
		}
	case "PUT /mmds":
		if second != "" && second != "config" {
			return fail("Unrecognized PUT request path `%s`.", second)
		}
	case "PUT /snapshot":
		if r.hasBody && second == "" {
			return fail("Missing snapshot operation type.")
		}
		if r.hasBody && second != "create" && second != "load" {
			return fail("Invalid request method and/or path: PUT /snapshot/%s.", second)
		}
	}
	return nil
}

// understand reads the id and the body.
func (m *machine) understand(found route, second string, r request) (*query, error) {
	q := &query{route: found}
	if found.id {
		if err := checkID(second); err != nil {
			return nil, err
		}
		q.id = second
	}
	if found.body == nil || !r.hasBody {
		return q, nil
	}
	body := reflect.New(reflect.TypeOf(found.body))
	body.Elem().Set(reflect.ValueOf(found.body)) // the defaults
	if err := (strict{m.version}).decode(r.body, body.Interface()); err != nil {
		return nil, fail("An error occurred when deserializing the json body of a request: %s.", err)
	}
	q.body = body.Interface()
	if found.id {
		if id := body.Elem().Field(0).String(); id != q.id {
			return nil, mismatch(body.Interface(), q.id, id)
		}
	}
	q.deprecated = isDeprecated(q.body)
	if r.method == "PATCH" && body.Elem().IsZero() && reflect.TypeOf(found.body) == reflect.TypeFor[machineUpdate]() {
		return nil, fail("Empty PATCH request.")
	}
	return q, nil
}

// mismatch is told with both names for network interfaces only.
func mismatch(body any, path, id string) error {
	switch body.(type) {
	case *netInterface, *netUpdate:
		return fail("The id from the path [%s] does not match the id from the body [%s]!", path, id)
	}
	return fail("The id from the path does not match the id from the body!")
}

func checkID(id string) error {
	if id == "" {
		return fail("The ID cannot be empty.")
	}
	for _, r := range id {
		if r != '_' && !unicode.IsLetter(r) && !unicode.IsNumber(r) {
			return fail("API Resource IDs can only contain alphanumeric characters and underscores.")
		}
	}
	return nil
}

// isDeprecated tells whether a body has a field that will go.
func isDeprecated(body any) bool {
	switch b := body.(type) {
	case *machineConfig:
		return b.CPUTemplate != nil
	case *machineUpdate:
		return b.CPUTemplate != nil
	case *vsockConfig:
		return b.DeprecatedID != nil
	case *snapshotLoad:
		return b.Memory != nil || b.EnableDiff
	case *mmdsConfig:
		return b.Version == "V1"
	}
	return false
}

// answer does what a request asks for. It is called for one request at a time. fatal says that the process ends once
// the answer is out.
func (m *machine) answer(r request) (a response, fatal bool) {
	q, err := m.find(r)
	if err == nil {
		err = m.allowed(q)
	}
	var result any
	if err == nil {
		if q.route.boot && m.state == notStarted {
			m.configured = true
		}
		result, err = q.route.run(m, q)
	}
	switch {
	case err != nil:
		a = faultMessage(err)
	case result == nil:
		a = response{status: 204}
	default:
		text, err := json.Marshal(result)
		if err != nil {
			a = faultMessage(err)
			break
		}
		a = response{status: 200, body: text}
	}
	if q != nil {
		a.deprecated, fatal = q.deprecated, q.fatal && err != nil
	}
	return a, fatal
}

func faultMessage(err error) response {
	status := 400
	var r rejected
	if errors.As(err, &r) {
		status = r.status
	}
	var text strings.Builder
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	_ = e.Encode(map[string]string{"fault_message": err.Error()}) // strings can be encoded
	return response{status: status, body: []byte(strings.TrimSuffix(text.String(), "\n"))}
}

// allowed looks whether this is the time for q.
func (m *machine) allowed(q *query) error {
	before := m.state == notStarted
	pre, post := q.route.pre, q.route.post
	if a, ok := q.body.(*action); ok {
		pre, post = a.Type == "InstanceStart", a.Type != "InstanceStart"
	}
	switch {
	case before && !pre:
		return failure(textBefore)
	case !before && q.route.hot:
		if !m.version.atLeast(version{1, 16, 0}) {
			return failure(textAfter)
		}
		if !m.pci {
			return fail("Device hotplug error: PCI is not enabled.")
		}
	case !before && !post:
		return failure(textAfter)
	}
	return nil
}
