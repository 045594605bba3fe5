package trainer

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"trainerd/internal/document"
	"trainerd/internal/fault"
)

// faults gathers what is wrong with a document, so that a caller sees all of it at once.
type faults []fault.Field

func (f *faults) add(name string, got any, expected string) {
	*f = append(*f, fault.Field{Name: name, Row: -1, Got: clip(fmt.Sprint(got)), Expected: expected})
}

// clip keeps a quoted value short enough for an error message.
func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "..."
	}
	return s
}

// object is a JSON object that is read member by member. What has not been
// read when finish is called is an unknown field.
type object struct {
	path    string
	members map[string]json.RawMessage
	order   []string
	read    []string
	faults  *faults
}

// parseObject reads one JSON object and nothing after it. Broken syntax is a
// Malformed fault with the byte offset; a repeated member is a field fault.
func parseObject(raw []byte, path string, f *faults) (*object, error) {
	o := &object{path: path, members: map[string]json.RawMessage{}, faults: f}
	members, err := document.Members(raw)
	switch {
	case errors.Is(err, document.ErrNotObject):
		f.add(o.name(""), clip(strings.TrimSpace(string(raw))), "a JSON object")
		return o, nil
	case err != nil:
		var s *json.SyntaxError
		if errors.As(err, &s) {
			return nil, fault.New(fault.Malformed, "malformed_json", "%s is not JSON: byte %d: %v", o.name(""), s.Offset, err)
		}
		return nil, fault.New(fault.Malformed, "malformed_json", "%s: %v", o.name(""), err)
	}
	for _, m := range members {
		if m.Again {
			f.add(o.name(m.Name), "the field twice", "each field once")
		}
		o.members[m.Name] = m.Value
		o.order = append(o.order, m.Name)
	}
	return o, nil
}

func (o *object) name(member string) string {
	switch {
	case o.path == "" && member == "":
		return "body"
	case o.path == "":
		return member
	case member == "":
		return o.path
	}
	return o.path + "." + member
}

// raw takes a member as it is; false when it is absent or null.
func (o *object) raw(member string) (json.RawMessage, bool) {
	o.read = append(o.read, member)
	v, ok := o.members[member]
	if !ok || string(v) == "null" {
		return nil, false
	}
	return v, true
}

// given reports whether a member is present and not null.
func (o *object) given(member string) bool {
	v, ok := o.members[member]
	return ok && string(v) != "null"
}

// isNull reports whether a member is present and null.
func (o *object) isNull(member string) bool {
	v, ok := o.members[member]
	return ok && string(v) == "null"
}

// object takes a member that is an object; an absent one reads as empty.
func (o *object) object(member string) *object {
	raw, ok := o.raw(member)
	if !ok {
		raw = json.RawMessage("{}")
	}
	sub, err := parseObject(raw, o.name(member), o.faults)
	if err != nil { // the whole document was valid JSON, so this cannot be syntax
		o.faults.add(o.name(member), clip(string(raw)), "a JSON object")
		return &object{path: o.name(member), faults: o.faults}
	}
	return sub
}

// text reads a string into dst, which keeps its default when the member is absent.
func (o *object) text(member string, dst *string) {
	if raw, ok := o.raw(member); ok {
		if json.Unmarshal(raw, dst) != nil {
			o.faults.add(o.name(member), clip(string(raw)), "a string")
		}
	}
}

// oneOf reads a string that must be one of the given.
func (o *object) oneOf(member string, dst *string, allowed ...string) {
	before := len(*o.faults)
	o.text(member, dst)
	if len(*o.faults) == before && !slices.Contains(allowed, *dst) {
		o.faults.add(o.name(member), strconv.Quote(*dst), "one of "+strings.Join(allowed, ", "))
	}
}

// integer reads a whole number in [low, high].
func (o *object) integer(member string, dst *int64, low, high int64) {
	raw, ok := o.raw(member)
	if !ok {
		return
	}
	expected := fmt.Sprintf("a whole number in [%d, %d]", low, high)
	v, err := strconv.ParseInt(string(raw), 10, 64)
	if err != nil || v < low || v > high {
		o.faults.add(o.name(member), clip(string(raw)), expected)
		return
	}
	*dst = v
}

// finish reports every member that was not read as an unknown field.
func (o *object) finish() {
	known := slices.Clone(o.read)
	slices.Sort(known)
	for _, name := range o.order {
		if !slices.Contains(known, name) {
			o.faults.add(o.name(name), "an unknown field", "one of "+strings.Join(known, ", "))
		}
	}
}

// take adds the fields of a fault of another package and says whether there was one.
func (f *faults) take(err error) bool {
	if err == nil {
		return false
	}
	if e, ok := fault.As(err); ok && len(e.Fields) > 0 {
		*f = append(*f, e.Fields...)
	} else {
		*f = append(*f, fault.Field{Name: "body", Row: -1, Got: clip(err.Error())})
	}
	return true
}
