package access

import (
	"fmt"
	"slices"
	"strings"
)

// Role is a class of things that a token may do.
type Role string

const (
	// Submit is a rollout worker's: hand rollouts in, sample and score with the policy.
	Submit Role = "submit"
	// Read is an inference node's or a dashboard's: states, steps, metrics and checkpoints.
	Read Role = "read"
	// Admin is an operator's: everything.
	Admin Role = "admin"
)

// Roles are all roles.
var Roles = []Role{Submit, Read, Admin}

// ParseRoles reads "submit,read".
func ParseRoles(text string) ([]Role, error) {
	var out []Role
	for _, part := range strings.Split(text, ",") {
		r := Role(strings.TrimSpace(part))
		if !slices.Contains(Roles, r) {
			return nil, fmt.Errorf("role %q: expected submit, read or admin", part)
		}
		if !slices.Contains(out, r) {
			out = append(out, r)
		}
	}
	return out, nil
}

// Rule is one row of the table.
type Rule struct {
	Route string // method and pattern, as the router names it
	May   []Role
	// Server says that the route is about all jobs: a token that is bound to a
	// job may not use it, whatever its role.
	Server bool
}

var (
	admins  = []Role{Admin}
	readers = []Role{Read, Admin}
	workers = []Role{Submit, Admin}
	anyone  = []Role{Submit, Read, Admin}
)

// Table says who may use which guarded route. A route without a row is refused
// to everybody. /healthz, /readyz and /openapi.json are not guarded: a probe has
// no token, and the description is the same for everybody. /metrics names every
// job and is guarded.
var Table = []Rule{
	{Route: "GET /metrics", May: readers, Server: true},
	{Route: "POST /v1/jobs", May: admins, Server: true},
	{Route: "GET /v1/jobs", May: readers, Server: true},
	{Route: "GET /v1/jobs/:job", May: anyone},
	{Route: "DELETE /v1/jobs/:job", May: admins},
	{Route: "POST /v1/jobs/:job/pause", May: admins},
	{Route: "POST /v1/jobs/:job/resume", May: admins},
	{Route: "POST /v1/jobs/:job/flush", May: workers},
	{Route: "POST /v1/jobs/:job/rollouts", May: workers},
	{Route: "GET /v1/jobs/:job/batches/:batch", May: anyone},
	{Route: "POST /v1/jobs/:job/sample", May: workers},
	{Route: "POST /v1/jobs/:job/logprobs", May: workers},
	{Route: "GET /v1/jobs/:job/steps", May: anyone},
	{Route: "GET /v1/jobs/:job/metrics", May: readers},
	{Route: "GET /v1/jobs/:job/events", May: anyone},
	{Route: "POST /v1/jobs/:job/checkpoints", May: admins},
	{Route: "GET /v1/jobs/:job/checkpoints", May: readers},
	{Route: "GET /v1/jobs/:job/checkpoints/latest", May: readers},
	{Route: "GET /v1/jobs/:job/checkpoints/:step", May: readers},
	{Route: "GET /v1/jobs/:job/checkpoints/:step/files/*", May: readers},
	{Route: "HEAD /v1/jobs/:job/checkpoints/:step/files/*", May: readers},
	{Route: "POST /v1/jobs/:job/checkpoints/:step/leases", May: readers},
	{Route: "GET /v1/jobs/:job/checkpoints/:step/leases", May: readers},
	{Route: "PUT /v1/jobs/:job/checkpoints/:step/leases/:lease", May: readers},
	{Route: "DELETE /v1/jobs/:job/checkpoints/:step/leases/:lease", May: readers},
	{Route: "GET /v1/jobs/:job/checkpoints/:step/delta", May: readers},
	{Route: "PUT /v1/jobs/:job/nodes/:node", May: readers},
	{Route: "GET /v1/jobs/:job/nodes", May: readers},
}

var ruleOf = func() map[string]Rule {
	m := make(map[string]Rule, len(Table))
	for _, r := range Table {
		m[r.Route] = r
	}
	return m
}()

// allows says whether a token may use a route on a job, "" when the route names none.
func (t Token) allows(route, job string) bool {
	rule, ok := ruleOf[route]
	if !ok || t.Job != "" && (rule.Server || t.Job != job) {
		return false
	}
	return slices.ContainsFunc(t.Roles, func(r Role) bool { return slices.Contains(rule.May, r) })
}
