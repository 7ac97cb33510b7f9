-- What Argo CD's menu offers for an AsyncRLJob: suspend or resume, and nothing once it has finished.

for _, each in ipairs(obj.status and obj.status.conditions or {}) do
  if each.type == "Finished" and each.status == "True" then
    return {}
  end
end

if obj.spec.suspend then
  return { resume = { displayName = "Resume", iconClass = "fa fa-fw fa-play" } }
end
return { suspend = { displayName = "Suspend", iconClass = "fa fa-fw fa-pause" } }
