package sagrpo

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"trainerd/internal/document"
	"trainerd/internal/fault"
)

// ParseObjective reads the "objective" member of a job over the defaults of the
// objective it names. An absent or null field keeps its default; a given one,
// 0 included, does not. Unknown fields and values of the wrong type are one
// Invalid fault that names every path. The values are not judged: call Validate.
func ParseObjective(raw json.RawMessage) (Objective, error) {
	name, err := peekName(raw)
	if err != nil {
		return Objective{}, err
	}
	o := DefaultObjective(name)
	var l layer
	l.object("objective", raw, reflect.ValueOf(&o).Elem())
	o.Name = canonical(o.Name)
	if o.Beta > 0 && !l.given["objective.reference.sync_every_steps"] {
		o.Reference.SyncEverySteps = defaultSyncEverySteps
	}
	if o.Reference.SyncEverySteps > 0 && !l.given["objective.reference.sync_alpha"] {
		o.Reference.SyncAlpha = defaultSyncAlpha
	}
	return o, l.err()
}

// ParseOptimizer reads the "optimizer" member of a job over DefaultOptimizer; see ParseObjective.
func ParseOptimizer(raw json.RawMessage) (Optimizer, error) {
	o := DefaultOptimizer()
	if err := wellFormed("optimizer", raw); err != nil {
		return o, err
	}
	var l layer
	l.object("optimizer", raw, reflect.ValueOf(&o).Elem())
	return o, l.err()
}

// peekName finds the objective's name, on which the other defaults depend. What
// is wrong with the rest is left to the layer.
func peekName(raw json.RawMessage) (string, error) {
	if err := wellFormed("objective", raw); err != nil {
		return "", err
	}
	var members map[string]json.RawMessage
	var name string
	if json.Unmarshal(raw, &members) == nil && json.Unmarshal(members["name"], &name) != nil {
		name = ""
	}
	return name, nil
}

// layer decodes JSON objects over structs that hold defaults, and collects what is wrong.
type layer struct {
	given map[string]bool // paths with a value other than null
	bad   []fault.Field
}

func (l *layer) err() error { return invalid(l.bad) }

func (l *layer) refuse(path string, raw json.RawMessage, expected string) {
	l.bad = append(l.bad, fault.Field{Name: path, Row: -1, Got: abbreviate(raw), Expected: expected})
}

// object decodes the members of raw into the fields of dst, matching the names
// of their json tags exactly.
func (l *layer) object(path string, raw json.RawMessage, dst reflect.Value) {
	if absent(raw) {
		return
	}
	members, err := document.Members(raw)
	if err != nil {
		l.refuse(path, raw, "an object")
		return
	}
	fields := make(map[string]reflect.Value)
	for i := range dst.NumField() {
		fields[dst.Type().Field(i).Tag.Get("json")] = dst.Field(i)
	}
	slices.SortStableFunc(members, func(a, b document.Member) int { return strings.Compare(a.Name, b.Name) })
	for _, m := range members {
		value, at := m.Value, path+"."+m.Name
		field, ok := fields[m.Name]
		switch {
		case m.Again:
			l.refuse(at, value, "each field once")
		case !ok:
			l.refuse(at, value, "no such field")
		case absent(value):
		case field.Kind() == reflect.Struct:
			l.object(at, value, field)
		default:
			l.value(at, value, field)
		}
	}
}

// value decodes a member that is not an object of fields.
func (l *layer) value(path string, raw json.RawMessage, dst reflect.Value) {
	if l.given == nil {
		l.given = make(map[string]bool)
	}
	l.given[path] = true
	fresh := reflect.New(dst.Type()) // so that a map replaces its default and a failed decode leaves it
	var err error
	if dst.Kind() == reflect.Array {
		// encoding/json would drop or zero-fill what does not fit.
		var list []json.RawMessage
		if err = json.Unmarshal(raw, &list); err == nil && len(list) != dst.Len() {
			err = fmt.Errorf("%d elements", len(list))
		}
		if slices.ContainsFunc(list, absent) {
			err = fmt.Errorf("a null element")
		}
	}
	if dst.Kind() == reflect.Map { // of which encoding/json would keep the last of two
		members, _ := document.Members(raw)
		if slices.ContainsFunc(members, func(m document.Member) bool { return m.Again }) {
			err = fmt.Errorf("a repeated name")
		}
	}
	if err == nil {
		err = json.Unmarshal(raw, fresh.Interface())
	}
	if err != nil {
		l.refuse(path, raw, expectation(dst.Type()))
		return
	}
	dst.Set(fresh.Elem())
}

// expectation says in words what JSON a Go type is read from.
func expectation(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Int, reflect.Int64:
		return "an integer"
	case reflect.Float64:
		return "a number"
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a string"
	case reflect.Array:
		return fmt.Sprintf("a list of %d numbers", t.Len())
	case reflect.Map:
		return "an object of numbers, each name once"
	}
	return t.String()
}

func wellFormed(path string, raw json.RawMessage) error {
	if !absent(raw) && !json.Valid(raw) {
		return fault.New(fault.Malformed, "invalid_json", "decode %s: not a JSON value", path)
	}
	return nil
}

func absent(raw json.RawMessage) bool {
	raw = bytes.TrimSpace(raw)
	return len(raw) == 0 || string(raw) == "null"
}

// abbreviate renders a JSON value for an error text.
func abbreviate(raw json.RawMessage) string {
	const limit = 60
	s := strings.Join(strings.Fields(string(raw)), " ")
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "..."
	}
	return s
}

// invalid wraps fields, sorted as found, in one fault; no fields is no error.
func invalid(bad []fault.Field) error {
	if len(bad) == 0 {
		return nil
	}
	return &fault.Error{Kind: fault.Invalid, Code: "invalid_field", Fields: bad}
}
