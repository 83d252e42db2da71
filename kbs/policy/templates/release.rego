# Release policy: who may have which key. Nothing is allowed unless a rule below says so.
#
# input: claims of the guest's token, made anew for each request from verified facts.
# data:  {"plugin": "resource", "resource-path": [repository, type, tag], "query": {}}
package policy

import rego.v1

default allow := false

allow if {
	data.plugin == "resource"
	input.submods.cpu0["ear.status"] == "affirming"
	input.submods.cpu0["ear.veraison.annotated-evidence"].tdx.td_attributes.debug == false

	# A GPU is demanded, not merely tolerated.
	input.submods.gpu0["ear.status"] == "affirming"

	# No further submodule may be less than affirming.
	every submod in input.submods {
		submod["ear.status"] == "affirming"
	}
}
